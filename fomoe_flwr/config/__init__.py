"""Settings: typed, validated, refused before anything starts.

`schema` is the tree of dataclasses, `checks` what they must not be, `compose` the way from `conf/`
to them. A wrong value is refused with the value, the allowed range and the key to change. No torch,
no Flower.
"""

from fomoe_flwr.config.checks import (
    LOCAL_STREAMS,
    PATHS,
    check,
    did_you_mean,
    fewest_residents,
)
from fomoe_flwr.config.compose import (
    RESUMABLE_KEYS,
    conf_dir,
    find_run,
    is_resumable,
    is_run,
    load_settings,
    paper_rows_known,
    read_settings,
    settings_from_dict,
)
from fomoe_flwr.config.overrides import expand_files, parse_overrides, quoted, refuse_option
from fomoe_flwr.config.schema import (
    BIASED_FAMILIES,
    FAMILYS_OWN,
    SHAPED_FAMILIES,
    SHARED_EXPERT_FAMILIES,
    BalanceSettings,
    CheckpointSettings,
    CostSettings,
    DataSettings,
    EvalSettings,
    ExecutionSettings,
    FederationSettings,
    LayoutSettings,
    LocalSettings,
    ModelSettings,
    OuterSettings,
    PrivacySettings,
    RoutingMode,
    Settings,
    WireSettings,
)
from fomoe_flwr.errors import SettingsError
