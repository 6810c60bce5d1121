"""What weights are worth on held-out data: metrics, and soups that are chosen by them."""
