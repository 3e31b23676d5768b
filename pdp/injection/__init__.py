"""Put the sidecar into pods, for clusters whose API server can not do so itself."""
