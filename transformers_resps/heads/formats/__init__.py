"""Convert heads between published layouts and this package's own format."""
