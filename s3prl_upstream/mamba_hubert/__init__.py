"""The upstream ``mamba_hubert``: a HuBERT model with a Mamba encoder read from an upstream folder."""
