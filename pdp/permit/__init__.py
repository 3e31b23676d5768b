"""Execute: leave to make one call, signed by the PDP and verified by the tool.

A tool server imports this package, and nothing else of the product::

    keys = PermitKeySet.from_file("permit-keys.json")
    verifier = PermitVerifier(keys, issuer="agent-pdp", audience="orders")
    permit = verifier.verify(token, tool="orders.update", arguments=arguments)
    redeemer.redeem(permit)  # a PermitRedeemer("unix:///run/pdp/pdp.sock")
    # permit.tenant says whose order it is; nothing in the arguments does.
"""

from __future__ import annotations

from pdp.permit.claims import Permit, PermitError
from pdp.permit.keys import PermitKeySet
from pdp.permit.redeemer import PermitRedeemer
from pdp.permit.sidecars import Sidecars
from pdp.permit.verifier import PermitVerifier

__all__ = ["Permit", "PermitError", "PermitKeySet", "PermitRedeemer", "PermitVerifier", "Sidecars"]
