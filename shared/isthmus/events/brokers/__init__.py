"""One module a broker, each the only importer of its client; `isthmus.events.open` opens them by configuration."""
