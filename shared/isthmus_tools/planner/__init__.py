"""From profiles and a network to a plan: candidates, what each costs, races on the real functions, the choice."""
