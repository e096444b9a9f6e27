"""Products by leaf: the partial sums that the canonical tree adds."""
