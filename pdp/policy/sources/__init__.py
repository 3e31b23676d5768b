"""Where bundles come from: a directory or file, HTTP(S), an OCI registry."""

from __future__ import annotations

from pdp.config import BundleSettings
from pdp.policy.sources.path import PathSource
from pdp.policy.sources.source import BundleSource


def open_source(settings: BundleSettings) -> BundleSource:
    """The source that the settings describe. Nothing is read yet."""
    if settings.http is not None:
        from pdp.policy.sources.http import HttpBundleSource  # noqa: PLC0415 - imports aiohttp

        return HttpBundleSource(settings.http)
    if settings.oci is not None:
        from pdp.policy.sources.oci import OciBundleSource  # noqa: PLC0415 - imports aiohttp

        return OciBundleSource(settings.oci)
    assert settings.path is not None  # noqa: S101 - the configuration has one of the three
    return PathSource(settings.path, poll_seconds=settings.poll_seconds)
