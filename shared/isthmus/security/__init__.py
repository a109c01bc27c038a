"""Trust between functions: keys from secrets, calls that are sealed or signed, replays refused."""
