"""How a call is cut up: specifications, plans, engines' policies, shapes of models."""
