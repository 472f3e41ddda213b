# Debian 12 with systemd as process 1 and an nginx that has its Lua module, for the tests that drive real units. Nothing
# of Headgate is in it: the tests copy a wheel into a running container. Build with --network host where containers have
# no network of their own.
FROM debian:bookworm-slim
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      systemd python3 python3-venv nginx libnginx-mod-http-lua lua-resty-core lua-cjson \
 && rm -rf /var/lib/apt/lists/*
STOPSIGNAL SIGRTMIN+3
CMD ["/lib/systemd/systemd"]
