"""Places for results beside brokers: callbacks over HTTP, and objects in a folder or in S3."""
