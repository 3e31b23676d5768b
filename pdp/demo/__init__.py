"""The demonstration, and an example to read: an agent service for two tenants whose
tools run only under permits.

Begin with :mod:`pdp.demo.agent` (the runtime), then :mod:`pdp.demo.orders` and
:mod:`pdp.demo.mail` (the tool servers); :mod:`pdp.demo.scenes` holds the attacks.
"""
