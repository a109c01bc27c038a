"""Plans from profiles and a network: cut search, candidates, predicted and measured costs, the choice."""
