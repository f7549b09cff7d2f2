"""ESPnet's S3PRL front end around an upstream that is truly frozen."""

from __future__ import annotations

from espnet2.asr.frontend.s3prl import S3prlFrontend

import s3prl_upstream
from s3prl_upstream.frozen import FrozenUpstream
from s3prl_upstream.rng import rng_preserved

assert s3prl_upstream  # its import registers our upstreams


class FrozenS3prlFrontend(S3prlFrontend):
    """``frontend: frozen_s3prl``: like ``s3prl``, but the upstream never trains, masks or drops, and computes once.

    ESPnet freezes by ``requires_grad`` alone, and its trainer puts the frozen module back into training mode.
    """

    def __init__(
        self,
        fs: int | str = 16000,
        frontend_conf: dict | None = None,
        multilayer_feature: bool = True,
        layer: int = -1,
        cache_mb: float = 1024.0,
    ) -> None:
        """Build the upstream ``frontend_conf['upstream']`` from ``frontend_conf['path_or_url']``.

        ``multilayer_feature`` gives the learned weighted sum of all layers, ``layer`` one of them. At most ``cache_mb``
        MB of layer outputs are remembered.
        """
        with rng_preserved():
            super().__init__(fs, dict(frontend_conf or {}), None, multilayer_feature, layer)
        self.upstream = FrozenUpstream(self.upstream, cache_mb)

    def reload_pretrained_parameters(self) -> None:
        """Undo what ESPnet's ``init`` option did to the upstream."""
        self.upstream.upstream.load_state_dict(self.pretrained_params)
        self.upstream.clear()
