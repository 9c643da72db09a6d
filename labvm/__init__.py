"""A Debian host that boots in qemu for one command: the place for what the developer's machine doesn't have."""
