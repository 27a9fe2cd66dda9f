"""Parts that several tests share: data, real ranks, servers, clusters and slow reference answers."""
