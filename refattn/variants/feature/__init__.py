"""Keys are summed before queries come: products of features, and pools of a whole sequence."""
