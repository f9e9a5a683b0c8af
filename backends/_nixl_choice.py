"""What UCX is given to choose from: by the options, by its own variables, and by what this host has."""

from __future__ import annotations

import os

from tensorferry.backends import _nixl_environment as environment
from tensorferry.backends._mapping import Mapping
from tensorferry.backends._nixl_environment import MEMCPY, RDMA, TCP, Unfit
from tensorferry.backends._nixl_options import NixlOptions


def choose(chosen: NixlOptions) -> tuple[frozenset[str], str]:
    """(what data may take, what UCX is restricted to). Raises Unfit where what is asked for cannot be had."""
    if chosen.backend != "UCX":
        if chosen.require:
            raise Unfit(f'require="{chosen.require}" is about UCX, and the backend is {chosen.backend}',
                        'Use backend="UCX"')  # fmt: skip
        return frozenset({chosen.backend.lower()}), ""
    tls = os.environ.get("UCX_TLS", "")
    ways = environment.allowed()
    cause, remedy = environment.why_not_rdma()
    if chosen.require == RDMA and cause:
        raise Unfit(f'require="rdma" cannot be had: {cause}', remedy)
    environment.refuse_nothing_left(cause, remedy)
    if chosen.require and chosen.require not in ways:
        name = "UCX_TLS" if chosen.require not in environment.ways(tls) else environment.MODULES_VARIABLE
        why = f"{name}={os.environ[name]} leaves it out"
        raise Unfit(f'require="{chosen.require}" cannot be had: {why}', f"Change or unset {name}")
    if chosen.require == MEMCPY and (refused := copies_refused()):
        raise Unfit(f'require="memcpy" cannot be had: {refused}', "Let processes trace each other (CAP_SYS_PTRACE)")
    if chosen.require in (RDMA, TCP):
        if tls and ways != {chosen.require}:
            raise Unfit(f'require="{chosen.require}" and UCX_TLS={tls}: UCX would use the latter', "Unset UCX_TLS")
        return frozenset({chosen.require}), chosen.require
    if not cause and not tls and not chosen.require:
        return frozenset({RDMA}), RDMA
    return (ways - {RDMA} if environment.why_never_rdma()[0] else ways), ""


def copies_refused() -> str:
    """Why no process of this host may copy into another, by the answer to copying within this one; "" where it may."""
    here = Mapping(4096)
    return environment.copy_refused(os.getpid(), here.address)
