"""One module a record store; `open` opens them by URL."""
