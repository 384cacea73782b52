"""Whether the hub can be asked for what a name means.

Left to themselves, the libraries ask a hub that does not answer five times for every file, with waits in
between, before they look into its cache on this machine or give up. Here it is asked once in a process.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError

from grads_dist.errors import ConfigError

log = logging.getLogger(__name__)

SECONDS = 5.0
"""How long the hub may take to answer."""


def cache_alone(name: str, option: str) -> bool:
    """Whether a model, adapter or tokenizer is to be looked for in the hub's cache, and not on the hub.

    Raises ConfigError, naming `option`, for what can only be a folder and is none.
    """
    if Path(name).is_dir():
        return False
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise ConfigError(f"{option}: no folder {name!r}")
    return not is_reached()


def is_reached() -> bool:
    """Whether the hub answers; it does not where HF_HUB_OFFLINE is set."""
    return unreached() is None


@functools.cache
def unreached() -> str | None:
    """Why the hub is not asked, in words; None where it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        # By the libraries' own client: their way out may be a proxy.
        status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
    except (HTTPError, OSError) as error:
        fault = type(error).__name__
    else:
        if status < 500:
            return None
        fault = f"status {status}"
    log.warning("%s does not answer (%s): names are looked for in its cache alone", constants.ENDPOINT, fault)
    return f"{constants.ENDPOINT} does not answer"
