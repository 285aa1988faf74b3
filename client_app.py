"""Flower's entry to the ClientApp."""

from fomoe_flwr.federation.apps import client_app as app

__all__ = ["app"]
