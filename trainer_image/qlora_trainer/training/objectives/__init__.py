"""What training minimises: a module an objective, behind `objective.Objective`, which is all that the loop knows."""
