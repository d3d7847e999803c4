"""Which variables of the environment are nobody's: those that Kubernetes makes up."""

from __future__ import annotations

import re

_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_ADDRESSES = ("tcp://", "udp://", "sctp://")


def is_service_link(name: str, value: str) -> bool:
    """Tell whether Kubernetes has set a variable, as in every pod for each Service. Of one called `lmcache` it looks like ours.

    Source: "Discovering services" in Kubernetes' documentation of Services.
    """
    return bool(_SERVICE_LINK.search(name)) or (name.endswith("_PORT") and value.startswith(_SERVICE_ADDRESSES))
