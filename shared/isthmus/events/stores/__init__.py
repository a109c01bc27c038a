"""One module a record store; `isthmus.events.open` opens them by URL."""
