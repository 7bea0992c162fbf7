"""Who is here: signed records of nodes, the directory that keeps them (client and server), and who follows it."""
