"""SSAMBA (Shams et al. 2024): a masked-patch audio model of bidirectional Mamba blocks, published or corrected."""
