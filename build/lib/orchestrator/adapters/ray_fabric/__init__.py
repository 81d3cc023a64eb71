"""The controller's fabric on Kubernetes: Ray, between the controller's pod and the agents beside the trainers.

    controller - channel.py ··· head.py - driver.py ═══ Ray ═══ relay - agent.py ··· trainer
    `--------- the controller's pod --------------'             `-- a stage's pod ---------'
                                                                ··· unix sockets

- `channel`: the controller's end, without Ray; `ports.AgentChannel`.
- `head`: a container beside the controller's, one for each namespace of jobs with a token of its own, or one for all.
  Runs a Ray head and the driver while a controller is connected.
- `driver`: the only file that imports Ray: finds the agents' nodes and keeps one relay, an actor, on each.
- `agent`: the sidecar: serves the trainer's socket, joins the head as a Ray node, and the next when it is lost.
- `node`: one Ray node as child processes: start, watch, kill. `wire`: the messages. `settings`, `program`: of the two
  programs.

Ray's own processes end hard when they lose their head, so none of ours that matters is one of them: the controller,
the head's program and the agent's are Ray-free and outlive every Ray.
"""
