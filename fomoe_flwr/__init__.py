"""Federated pre-training of Mixture-of-Experts language models without full replicas."""

__version__ = "0.1.0"
