"""Many runs of one notebook: parameters read and checked, each run in a process of its own, results side by side."""
