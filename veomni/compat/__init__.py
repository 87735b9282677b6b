"""Private names of torch: each once, with its reason and the versions it was measured on."""
