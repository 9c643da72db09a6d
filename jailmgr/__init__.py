"""System containers for Linux, carved into tenants."""

__version__ = "0.1.0"
