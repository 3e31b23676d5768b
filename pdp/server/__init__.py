"""The gRPC and HTTP faces of the sidecar, and its life. Nothing is decided here."""
