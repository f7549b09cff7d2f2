"""The upstream ``ssamba``: a masked-patch audio model read from an upstream folder."""
