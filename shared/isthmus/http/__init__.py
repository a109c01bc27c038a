"""HTTP from the standard library: a bounded connection pool, look-ups and connects within a deadline."""
