"""For tests, ours and yours: the scripted hypervisor, faulty doubles, fixtures."""
