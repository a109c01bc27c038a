"""Federated averaging: nodes train on their own data, a server averages their weights; data never leaves a node."""
