"""The service's page, which only shows: queues and cards as they fill, who waits and why, and each job's course.

    sight      who may see what
    view       the world as it was read last, at most once an interval
    outlook    when jobs are expected to start and to end, worked out beside the requests
    figures    what MLflow has of a job, with a bound on the wait
    overview   what the first page shows, of a view
    job_page   what a job's page shows
    charts     curves and time lines, as the numbers of an SVG
    app        addresses, headers, templates
    server     the program that answers on a port of this machine
    cluster    the one of a cluster
    token_gate, token_login    who may look there, and how a token is shown

Nothing of it writes to the service, and no text of a user's reaches a browser but escaped.
"""
