"""Builds the Debian package, with its manual pages and completions: `script/build-deb`."""
