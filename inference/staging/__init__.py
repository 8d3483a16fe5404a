"""Steps without Pyro: the loss and its gradient as one graph of tensor operations, compiled."""
