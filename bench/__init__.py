"""jailmgr and lxc side by side, on the same machine, in one run, with the same root file system."""
