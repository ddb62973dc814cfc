"""`flower-superlink` with one door closed: other machines get 403 for all but `/v1/fleet/` (clients) and `/health`.

Flower 1.41 serves clients (fleet), operators (control) and its own processes (runtime) on one port, and without an
account plugin the control interface asks nobody who they are: whoever reaches the port registers a key of their own,
then starts a run, which is code that every client executes. Registered keys protect nothing while that door is open.
Operators therefore work on the server's own machine, or through a tunnel that ends there. A proxy on that machine makes
everyone look local: let it pass `/v1/fleet/` only. `commands.superlink_command` starts this module.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

REFUSED = "only clients' calls are answered to other machines: run operators' commands on the server's own machine\n"


def allowed(path: str, peer: str | None, here: str | None) -> bool:
    """Whether a call to `path` from the address `peer`, received at the address `here`, is answered.

    Formula: the path is `/health` or below `/v1/fleet/`, or the peer is this machine: a loopback address, or `here`.
    """
    if path == "/health" or (path.startswith("/v1/fleet/") and ".." not in path):
        return True
    try:
        address = ipaddress.ip_address(peer or "")
    except ValueError:
        return False
    # a SuperLink that listens on one address only is called by its own processes at that address
    return peer == here or (getattr(address, "ipv4_mapped", None) or address).is_loopback


def guarded(app: ASGIApp) -> ASGIApp:
    """An ASGI application that answers 403 where `allowed` says no."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        peer, here = ((scope.get(side) or (None,))[0] for side in ("client", "server"))
        answered = scope["type"] == "lifespan" or allowed(scope["path"], peer, here)
        await (app if answered else PlainTextResponse(REFUSED, 403))(scope, receive, send)

    return answer


def main() -> None:
    """Run `flower-superlink` with its application guarded."""
    import flwr.superlink.main as superlink
    from flwr.superlink.cli.flower_superlink import flower_superlink

    create = superlink.create_app

    def create_guarded(*args: Any, **kwargs: Any) -> ASGIApp:
        return guarded(create(*args, **kwargs))

    superlink.create_app = create_guarded  # type: ignore[assignment]  # looked up there when the server starts
    flower_superlink()


if __name__ == "__main__":
    main()
