"""The choice of a request's route: model catalog, route selection, codec override, and the accuracy guard."""
