"""Bad inputs, as data: recipes, models and adapters, calls, requests; `trying.py` tries them."""
