{{/* Names. Cluster-wide objects carry the namespace's name, too, so that two releases never meet. */}}
{{- define "qlora.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "qlora.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "qlora.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "qlora.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "qlora.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "qlora.fullname" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "qlora.serviceAccount" -}}
{{- default (include "qlora.fullname" .) .Values.controller.serviceAccount.name -}}
{{- end -}}

{{- define "qlora.mlflow.serviceAccount" -}}
{{- default (printf "%s-mlflow" (include "qlora.fullname" .)) .Values.mlflow.serviceAccount.name -}}
{{- end -}}

{{- define "qlora.page.serviceAccount" -}}
{{- default (printf "%s-page" (include "qlora.fullname" .)) .Values.page.serviceAccount.name -}}
{{- end -}}

{{- define "qlora.raySecret" -}}
{{- default (printf "%s-ray-token" (include "qlora.fullname" .)) .Values.ray.auth.existingSecret -}}
{{- end -}}

{{- define "qlora.storeClaim" -}}
{{- default (printf "%s-store" (include "qlora.fullname" .)) .Values.store.pvc.existingClaim -}}
{{- end -}}

{{- define "qlora.mlflow.claim" -}}
{{- default (printf "%s-mlflow" (include "qlora.fullname" .)) .Values.mlflow.storage.existingClaim -}}
{{- end -}}

{{/* Claims that no job may name, as a JSON array. */}}
{{- define "qlora.reservedClaims" -}}
{{- $reserved := .Values.admissionPolicy.reservedClaims -}}
{{- if include "qlora.bundlesMlflow" . -}}
{{- $reserved = prepend $reserved (include "qlora.mlflow.claim" .) -}}
{{- end -}}
{{- if hasPrefix "pvc://" .Values.modelCache -}}
{{- $reserved = append $reserved (trimPrefix "pvc://" .Values.modelCache) -}}
{{- end -}}
{{- $reserved | toJson -}}
{{- end -}}

{{/* Labels: (dict "root" $ "component" "controller"). */}}
{{- define "qlora.selectorLabels" -}}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/name: {{ include "qlora.name" .root }}
{{- end -}}

{{- define "qlora.labels" -}}
{{- $labels := include "qlora.selectorLabels" . | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- $_ := set $labels "app.kubernetes.io/part-of" "qlora-orchestrator" -}}
{{- $_ := set $labels "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version) -}}
{{- $_ := set $labels "owner" .root.Values.owner -}}
{{- toYaml (merge $labels .root.Values.commonLabels) -}}
{{- end -}}

{{/* How the controller labels the jobs' pods. */}}
{{- define "qlora.trainerLabels" -}}
app.kubernetes.io/component: trainer
app.kubernetes.io/part-of: qlora-orchestrator
{{- end -}}

{{/* An image: (dict "root" $ "image" .Values.image.controller). */}}
{{- define "qlora.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The namespaces that jobs may live in, as a JSON list. */}}
{{- define "qlora.jobNamespaces" -}}
{{- .Values.jobs.namespaces | default (list .Release.Namespace) | uniq | sortAlpha | toJson -}}
{{- end -}}

{{- define "qlora.bundlesMlflow" -}}
{{- if not .Values.mlflow.trackingUri }}yes{{ end -}}
{{- end -}}

{{- define "qlora.trackingUri" -}}
{{- default (printf "http://%s-mlflow.%s.svc:%v" (include "qlora.fullname" .) .Release.Namespace .Values.mlflow.port) .Values.mlflow.trackingUri -}}
{{- end -}}

{{- define "qlora.storeUri" -}}
{{- if eq .Values.store.type "s3" -}}
{{- required "store.s3.uri is needed for store.type s3: s3://bucket/prefix" .Values.store.s3.uri -}}
{{- else -}}
{{- printf "pvc://%s/%s" (include "qlora.storeClaim" .) .Values.store.pvc.path -}}
{{- end -}}
{{- end -}}

{{/* Pod Security `restricted`, the same for every pod of the chart. */}}
{{- define "qlora.podSecurity" -}}
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
runAsGroup: 65532
runAsNonRoot: true
runAsUser: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "qlora.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop:
    - ALL
privileged: false
readOnlyRootFilesystem: true
runAsGroup: 65532
runAsNonRoot: true
runAsUser: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Spread: (dict "root" $ "component" "controller" "nodeAffinity" ...). Preferred, so that one node is enough. */}}
{{- define "qlora.affinity" -}}
{{- with .nodeAffinity }}
nodeAffinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - podAffinityTerm:
        labelSelector:
          matchLabels:
            {{- include "qlora.selectorLabels" . | nindent 12 }}
        topologyKey: kubernetes.io/hostname
      weight: 100
{{- end -}}

{{- define "qlora.spread" -}}
{{- $root := . -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- labelSelector:
    matchLabels:
      {{- include "qlora.selectorLabels" $root | nindent 6 }}
  maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
{{- end }}
{{- end -}}

{{/* The volume with an account's token, by hand: bounded in time, and in one container alone. */}}
{{- define "qlora.apiAccess" -}}
- name: api-access
  projected:
    defaultMode: 288
    sources:
      - serviceAccountToken:
          expirationSeconds: 3607
          path: token
      - configMap:
          items:
            - key: ca.crt
              path: ca.crt
          name: kube-root-ca.crt
      - downwardAPI:
          items:
            - fieldRef:
                fieldPath: metadata.namespace
              path: namespace
{{- end -}}

{{- define "qlora.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* How the controller and the jobs log in to your own MLflow: variables, volumes and mounts, as JSON. */}}
{{- define "qlora.mlflowLogin" -}}
{{- $env := list -}}
{{- $volumes := list -}}
{{- $mounts := list -}}
{{- with .Values.mlflow.auth.existingSecret -}}
{{- $env = append $env (dict "name" "QLORA_TRACKING_LOGIN_FOLDER" "value" "/var/run/qlora-mlflow/login") -}}
{{- $volumes = append $volumes (dict "name" "mlflow-login" "secret" (dict "defaultMode" 288 "secretName" .)) -}}
{{- $mounts = append $mounts (dict "mountPath" "/var/run/qlora-mlflow/login" "name" "mlflow-login" "readOnly" true) -}}
{{- end -}}
{{- with .Values.mlflow.auth.caConfigMap -}}
{{- $env = append $env (dict "name" "MLFLOW_TRACKING_SERVER_CERT_PATH" "value" "/var/run/qlora-mlflow/ca/ca.crt") -}}
{{- $volumes = append $volumes (dict "name" "mlflow-ca" "configMap" (dict "items" (list (dict "key" "ca.crt" "path" "ca.crt")) "name" .)) -}}
{{- $mounts = append $mounts (dict "mountPath" "/var/run/qlora-mlflow/ca" "name" "mlflow-ca" "readOnly" true) -}}
{{- end -}}
{{- dict "env" $env "volumes" $volumes "mounts" $mounts | toJson -}}
{{- end -}}

{{/* The bounded template of the jobs' pods: the user's fields, with credentials of store, hub and MLflow as files. */}}
{{- define "qlora.podTemplate" -}}
{{- $template := deepCopy .Values.trainer.podTemplate -}}
{{- $env := $template.env -}}
{{- $volumes := $template.volumes -}}
{{- $mounts := $template.volumeMounts -}}
{{- if eq .Values.store.type "s3" -}}
{{- with .Values.store.s3 -}}
{{- if .endpointUrl -}}{{- $env = append $env (dict "name" "AWS_ENDPOINT_URL" "value" .endpointUrl) -}}{{- end -}}
{{- if .region -}}{{- $env = append $env (dict "name" "AWS_REGION" "value" .region) -}}{{- $env = append $env (dict "name" "AWS_DEFAULT_REGION" "value" .region) -}}{{- end -}}
{{- if .credentialsSecret -}}
{{- $env = append $env (dict "name" "AWS_SHARED_CREDENTIALS_FILE" "value" "/etc/qlora/s3/credentials") -}}
{{- $items := list (dict "key" .credentialsKey "path" "credentials") -}}
{{- $volumes = append $volumes (dict "name" "s3-credentials" "secret" (dict "defaultMode" 288 "items" $items "secretName" .credentialsSecret)) -}}
{{- $mounts = append $mounts (dict "mountPath" "/etc/qlora/s3" "name" "s3-credentials" "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.trainer.hubToken -}}
{{- if .existingSecret -}}
{{- $env = append $env (dict "name" "HF_TOKEN_PATH" "value" "/etc/qlora/hub/token") -}}
{{- $items := list (dict "key" .key "path" "token") -}}
{{- $volumes = append $volumes (dict "name" "hub-token" "secret" (dict "defaultMode" 288 "items" $items "secretName" .existingSecret)) -}}
{{- $mounts = append $mounts (dict "mountPath" "/etc/qlora/hub" "name" "hub-token" "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- $login := include "qlora.mlflowLogin" . | fromJson -}}
{{- $env = concat $env $login.env -}}
{{- $volumes = concat $volumes $login.volumes -}}
{{- $mounts = concat $mounts $login.mounts -}}
{{- $_ := set $template "env" $env -}}
{{- $_ := set $template "volumes" $volumes -}}
{{- $_ := set $template "volumeMounts" $mounts -}}
{{- if and .Values.priorityClass.create (not $template.priorityClassName) -}}
{{- $_ := set $template "priorityClassName" (printf "%s-trainer" (include "qlora.clusterName" .)) -}}
{{- end -}}
{{- if not $template.imagePullSecrets -}}
{{- $secrets := list -}}
{{- range .Values.image.pullSecrets -}}{{- $secrets = append $secrets (dict "name" .) -}}{{- end -}}
{{- $_ := set $template "imagePullSecrets" $secrets -}}
{{- end -}}
{{- range $key, $value := $template -}}
{{- if empty $value -}}{{- $_ := unset $template $key -}}{{- end -}}
{{- end -}}
{{- toYaml $template -}}
{{- end -}}

{{/* Names are resolved by the cluster's DNS, wherever it runs. */}}
{{- define "qlora.dnsEgress" -}}
- ports:
    - port: 53
      protocol: TCP
    - port: 53
      protocol: UDP
{{- end -}}

{{/* To the MLflow that the chart brings. */}}
{{- define "qlora.mlflowEgress" -}}
- ports:
    - port: {{ .Values.mlflow.port }}
      protocol: TCP
  to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ .Release.Namespace }}
      podSelector:
        matchLabels:
          {{- include "qlora.selectorLabels" (dict "root" . "component" "mlflow") | nindent 10 }}
{{- end -}}

{{/* The jobs' pods as peers of a NetworkPolicy. */}}
{{- define "qlora.trainerPeers" -}}
- namespaceSelector:
    {{- if .Values.jobs.allNamespaces }}
    {}
    {{- else }}
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values:
          {{- include "qlora.jobNamespaces" . | fromJsonArray | toYaml | nindent 10 }}
    {{- end }}
  podSelector:
    matchLabels:
      {{- include "qlora.trainerLabels" . | nindent 6 }}
{{- end -}}

{{/* Those that a head serves: (dict "root" $ "head" $head). */}}
{{- define "qlora.headPeers" -}}
{{- if .head.namespace -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ .head.namespace }}
  podSelector:
    matchLabels:
      {{- include "qlora.trainerLabels" .root | nindent 6 }}
{{- else -}}
{{- include "qlora.trainerPeers" .root -}}
{{- end -}}
{{- end -}}

{{/* Names that MLflow answers to; a browser elsewhere must not reach it by a name of its own making (DNS rebinding). */}}
{{- define "qlora.mlflow.allowedHosts" -}}
{{- $name := printf "%s-mlflow" (include "qlora.fullname" .) -}}
{{- $hosts := list "localhost:*" "127.0.0.1:*" -}}
{{- range list "" (printf ".%s" .Release.Namespace) (printf ".%s.svc" .Release.Namespace) (printf ".%s.svc.cluster.local" .Release.Namespace) -}}
{{- $hosts = append $hosts (printf "%s%s:%v" $name . $.Values.mlflow.port) -}}
{{- end -}}
{{- concat $hosts .Values.mlflow.allowedHosts | join "," -}}
{{- end -}}

{{/*
Ray's heads, as a JSON list: one for each namespace of jobs, or one for all whose namespace is empty. Who has a head's token
can run code in it, so heads share neither token, volumes nor ports. A namespace's place in jobs.namespaces says its ports.
*/}}
{{- define "qlora.rayHeads" -}}
{{- $heads := list -}}
{{- $secret := include "qlora.raySecret" . -}}
{{- $namespaces := .Values.jobs.namespaces | default (list .Release.Namespace) | uniq -}}
{{- if not .Values.ray.enabled -}}
{{- else if or .Values.jobs.allNamespaces (not .Values.ray.perNamespace) -}}
{{- $heads = list (dict "namespace" "" "name" "ray-head" "volume" "fabric" "scratch" "ray-scratch" "token" "ray-token" "portName" "ray" "port" .Values.ray.port "nodePort" .Values.ray.nodePort "secret" $secret) -}}
{{- else if gt (len $namespaces) 16 -}}
{{- fail (printf "ray.perNamespace takes a head beside each controller for every namespace of jobs, and here are %d: at most 16. Set it to false, and see docs/operators/security.md for what then shares a token" (len $namespaces)) -}}
{{- else -}}
{{- range $i, $namespace := $namespaces -}}
{{- $own := ternary $secret (printf "%s-%s" $secret $namespace) (eq $namespace $.Release.Namespace) -}}
{{- $heads = append $heads (dict "namespace" $namespace "name" (printf "ray-head-%d" $i) "volume" (printf "fabric-%d" $i) "scratch" (printf "ray-scratch-%d" $i) "token" (printf "ray-token-%d" $i) "portName" (printf "ray-%d" $i) "port" (add $.Values.ray.port (mul 21 $i)) "nodePort" (add $.Values.ray.nodePort (mul 21 $i)) "secret" $own) -}}
{{- end -}}
{{- end -}}
{{- $heads | toJson -}}
{{- end -}}

{{/* What a Ray node listens on: 20 ports from this one on. */}}
{{- define "qlora.rayNodePorts" -}}
- endPort: {{ add . 19 }}
  port: {{ int . }}
  protocol: TCP
{{- end -}}
