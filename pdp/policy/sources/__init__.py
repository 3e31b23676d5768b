"""Where bundles come from: a directory or file, HTTP(S), an OCI registry."""
