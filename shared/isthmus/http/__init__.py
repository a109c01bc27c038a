"""HTTP from the standard library: a bounded connection pool, connects within a deadline and to permitted addresses."""
