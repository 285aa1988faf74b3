"""The language model: stock transformers classes of which only resident experts are allocated."""
