"""zstd on top of a codec, where the extra is installed."""

from __future__ import annotations

from types import ModuleType

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Data


def zstd_module() -> ModuleType:
    """Import the library. Raises CodecError where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise CodecError("wire.zstd needs a library: pip install 'fomoe-flwr[zstd]'") from error
    return zstandard


def compress(data: Data, level: int) -> bytes:
    """Compress to one frame that names its content's size."""
    packed: bytes = zstd_module().ZstdCompressor(level=level).compress(data)
    return packed


def decompress(data: Data, num_bytes: int) -> bytes:
    """Decompress a frame of exactly `num_bytes` of content; a larger one is refused unopened.

    Raises CodecError for anything else.
    """
    zstandard = zstd_module()
    try:
        announced = zstandard.get_frame_parameters(data).content_size
        if announced != num_bytes:
            raise CodecError(
                f"compressed bytes announce {announced} bytes, the shape needs {num_bytes}"
            )
        opened: bytes = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=num_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CodecError(f"bytes are no zstd frame: {error}") from error
    if len(opened) != num_bytes:
        raise CodecError(f"bytes open to {len(opened)}, the shape needs {num_bytes}")
    return opened
