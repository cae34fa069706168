"""What `auto` is made of: candidates for each tensor, what each costs and spoils, and the choice under a budget."""
