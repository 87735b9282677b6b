"""Mixture-of-experts layers: sort tokens by expert, run the experts, put the results together."""
