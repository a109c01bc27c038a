"""Message queues in, results out: consumers and publishers of brokers, the trigger between them and the router."""
