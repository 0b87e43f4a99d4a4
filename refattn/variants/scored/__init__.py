"""Every query is compared with every key it sees: weights of scores, and what normalises them."""
