"""The S3PRL face of the project: ``import s3prl_upstream`` makes its upstreams known to S3PRL.

``mamba_hubert`` reads a HuBERT's folder; ``ssamba``, ``ssamba_mean`` and ``ssamba_50hz`` read an SSAMBA's.

The import costs a few milliseconds: S3PRL itself is not imported, its hub is completed when somebody imports it.
"""

from espnet_mamba import offline
from s3prl_upstream import hook

offline.prepare()
hook.install()


def preload() -> None:
    """Import S3PRL now, so that processes forked later share it."""
    import s3prl.nn  # noqa: F401
